"""What pretrain.py is made of."""

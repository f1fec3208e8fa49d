"""What the read-outs of frozen encoders share."""

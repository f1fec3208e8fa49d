"""What stages and steps cost, by the paper's count and by ours."""

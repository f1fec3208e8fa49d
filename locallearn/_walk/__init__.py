"""One local pass, the only place where tensors meet the plan: stages cut apart, gradients walked down, parts run again."""

"""What is learnt of a user's backbone, decoders and losses before the first step."""

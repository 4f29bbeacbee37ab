"""What a run of stage two would find in its conversations and images."""

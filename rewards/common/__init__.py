"""What several families of reward models share."""

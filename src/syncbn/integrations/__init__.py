"""What brings syncbn to the systems that start training elsewhere, a module for each."""

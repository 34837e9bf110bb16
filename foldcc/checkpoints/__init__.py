"""What is kept of a folded model on disk: weights as its library has them, and all that training resumes from."""

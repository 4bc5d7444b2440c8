"""What several methods ask the door for: a mixture of Gaussians for each class, and a linear classifier."""

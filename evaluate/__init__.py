"""Stage three: what the backbone and the classifier are worth, measured once on the test images."""

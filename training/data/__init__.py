"""Cohorts, pairs of images for training, and the programs that prepare them."""

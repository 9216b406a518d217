"""The experiments of arXiv 1908.08767 and a study of training signals."""

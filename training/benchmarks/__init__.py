"""Parts of the benchmark: the pairs, the methods that are compared, and how a result is measured."""

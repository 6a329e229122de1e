"""What is collected of a tensor, and how its range is solved from that; the two are kept apart.

`TensorCollector` (torch) sees batches; `TensorStatistics` (numpy) is what it leaves, mergeable exactly; `solve_amax`
turns that into amax by any of the methods in `solve.SOLVERS`, one a file, without data and without torch.
"""

"""Statistics of a tensor, and the methods that compute its range from them; the two are separate.

`TensorCollector` (torch) sees batches. `TensorStatistics` (numpy) is the result, which merges exactly. `solve_amax`
computes amax from it by any of the methods in `solve.SOLVERS`, one file each, without data and without torch.
"""

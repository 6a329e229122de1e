"""What is collected of a tensor, and how its range is solved from that; the two are kept apart.

Calibrators (`max.py`, `histogram.py`) see batches and remember statistics; solvers (`percentile.py`, `mse.py`,
`entropy.py`) turn the counts of a histogram into amax and need no data.
"""

from qdq.observers.histogram import HistogramCalibrator as HistogramCalibrator
from qdq.observers.max import MaxCalibrator as MaxCalibrator

Calibrator = MaxCalibrator | HistogramCalibrator

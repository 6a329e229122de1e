"""Calibrators, and ranges of weights without calibration."""

from qdq.compat.calib import calibrator as calibrator
from qdq.compat.calib.histogram import HistogramCalibrator as HistogramCalibrator
from qdq.compat.calib.max import MaxCalibrator as MaxCalibrator
from qdq.compat.calib.weights import calibrate_weights as calibrate_weights

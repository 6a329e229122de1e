"""`reduce_amax`, and `quant_logging`."""

from qdq.compat.utils import quant_logging as quant_logging
from qdq.compat.utils.reduce_amax import reduce_amax as reduce_amax

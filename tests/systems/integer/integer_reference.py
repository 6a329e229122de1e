"""Integer-only layers in numpy int64, written as loops over the formula of the paper."""

import numpy as np


def to_array(tensor):
    return tensor.detach().cpu().double().numpy()


def pad_codes(codes, padding, zero_point):
    """Codes `[N, C, H, W]` with the code of real 0 around them."""
    height, width = padding
    sides = ((0, 0), (0, 0), (height, height), (width, width))
    return np.pad(codes, sides, constant_values=zero_point)


def convolve(codes, weight, stride, dilation, groups):
    """Sums of products, int64: `[N, C, H, W]` and `[O, C / groups, KH, KW]`."""
    codes, weight = codes.astype(np.int64), weight.astype(np.int64)
    outputs, inputs, kernel_height, kernel_width = weight.shape
    height = (codes.shape[2] - dilation[0] * (kernel_height - 1) - 1) // stride[0] + 1
    width = (codes.shape[3] - dilation[1] * (kernel_width - 1) - 1) // stride[1] + 1
    sums = np.zeros((len(codes), outputs, height, width), dtype=np.int64)
    for output in range(outputs):
        first = output // (outputs // groups) * inputs
        for row in range(kernel_height):
            for column in range(kernel_width):
                top, left = row * dilation[0], column * dilation[1]
                window = codes[
                    :,
                    first : first + inputs,
                    top : top + (height - 1) * stride[0] + 1 : stride[0],
                    left : left + (width - 1) * stride[1] + 1 : stride[1],
                ]
                taps = weight[output, :, row, column].reshape(1, -1, 1, 1)
                sums[:, output] += (window * taps).sum(1)
    return sums


def requantize(sums, ratio, zero_point, lowest, highest):
    """The codes of the output, and where M times the sum is so near to a tie that both neighbours are right."""
    scaled = sums * ratio
    is_tie = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-4
    return np.clip(np.rint(scaled) + zero_point, lowest, highest), is_tie

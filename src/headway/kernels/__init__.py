"""Hot loops, each as a native CPU kernel beside a plain-torch reference with the same signature.

`HEADWAY_KERNELS=reference` forces the references. Which of the two runs is decided per call: tensors
that a kernel cannot take (another device or dtype, not contiguous) go to the reference.
"""

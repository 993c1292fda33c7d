"""Hot loops, each as a native CPU kernel beside a plain-torch reference with the same signature.

`HEADWAY_KERNELS=reference` forces the references. Which of the two runs is decided per call: tensors
that a kernel cannot take (another device or dtype, gaps in memory) go to the reference. `library` finds
the compiled library and says why it is not there; its C sources are in `native/`.
"""

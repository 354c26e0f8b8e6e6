"""nanoip2p: InstructPix2Pix (Brooks et al. 2211.09800), small enough to read in an afternoon."""

__version__ = "0.1.0"

"""What can be measured of a fit: gradient variance and its parts, looks during training, convergence, quality.

All of it is written down in the plain data of ``records``, from which reports are made.
"""

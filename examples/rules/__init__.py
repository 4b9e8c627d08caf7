"""Which rule of fusion stands the noise of a jammed uplink best: all of the library's, on the testbed."""

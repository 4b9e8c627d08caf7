"""Plug-ins: what to add to a training code of your own, library by library, in at most 30 lines each."""

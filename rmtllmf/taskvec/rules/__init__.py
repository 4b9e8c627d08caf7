"""Rules that fuse task vectors without any data: one rule, one file, each under its name in `rmtllmf.taskvec`."""

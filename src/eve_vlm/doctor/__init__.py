"""Whether this machine is fit for work: `eve doctor`."""

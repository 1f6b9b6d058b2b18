"""What every run imports: loaded once, into the process that the runs are forked from.

Nothing here starts a thread or touches a GPU, so that a fork of this process is a process like any other.
"""

import torch.utils.tensorboard  # noqa: F401

import backforward.fitting
import backforward.models
import backforward.normprop
import backforward.rules
import backforward.stack_fitting  # noqa: F401

"""What every run imports: loaded once, into the process that the runs are forked from.

Nothing here starts a thread or touches a GPU, so that a fork of this process is a process like any other.
"""

import signal

# Ctrl-C in the terminal reaches this process too. Once it has imported all, Python has it ignore that; before, a sweep
# that is interrupted would print where in its imports this process was.
_before = signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    import torch.utils.tensorboard  # noqa: F401

    import backforward_suite.train.fit  # noqa: F401
finally:
    signal.signal(signal.SIGINT, _before)

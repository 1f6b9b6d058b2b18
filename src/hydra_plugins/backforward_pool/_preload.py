"""What every run imports: loaded once, into the process that the runs are forked from.

Nothing here starts a thread or touches a GPU, so that a fork of this process is a process like any other.
"""

import backforward.fitting
import backforward.models
import backforward.normprop
import backforward.rules  # noqa: F401

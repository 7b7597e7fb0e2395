"""The simulated pyACL under the name `acl`, for a process that has this folder on its path."""

from __future__ import annotations

import sys

from omforge.runtime.acl_sim import simulated_acl

# `import acl` gives what stands here when this file has run.
sys.modules[__name__] = simulated_acl()

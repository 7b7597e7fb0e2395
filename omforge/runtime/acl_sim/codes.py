"""pyACL's return codes, as far as the simulator gives them.

Sources: hicann/runtime:include/external/acl/acl_base_rt.h,
hicann/runtime:include/external/acl/error_codes/rt_error_codes.h and
hicann/ge:inc/external/ge/ge_error_codes.h. Which of them a device gives for a given mistake is
known where a comment says so; elsewhere the nearest one was chosen, and only `!= 0` should be
relied upon.
"""

from __future__ import annotations

SUCCESS = 0

INVALID_PARAM = 100000
UNINITIALIZE = 100001
REPEAT_INITIALIZE = 100002
REPEAT_FINALIZE = 100037
RELATIVE_RESOURCE_NOT_CLEARED = 148051
FEATURE_UNSUPPORTED = 200006

RT_PARAM_INVALID = 107000
RT_INVALID_DEVICE = 107001
RT_CONTEXT_NULL = 107002
RT_EVENT_TIMESTAMP_INVALID = 107006
RT_INVALID_MEMORY_TYPE = 107016
RT_INVALID_HANDLE = 107017
# hicann/runtime:src/runtime/api/impl/api_error.cc, MemCopy2DCheckParam
RT_FEATURE_NOT_SUPPORT = 207000
RT_MEMORY_ALLOCATION = 207001
RT_MEMORY_FREE = 207002
RT_STREAM_NOT_COMPLETE = 507004
RT_MODEL_EXECUTE = 507011

# hicann/ge:runtime/v1/graph/load/model_manager/davinci_model.cc, CheckUserAndModelSize
GE_PARAM_INVALID = 145000
# hicann/ge:base/common/helper/model_parser_base.cc, LoadFromFile and ParseModelContent
GE_MODEL_PATH_INVALID = 145002
GE_MODEL_ID_INVALID = 145003
GE_MODEL_DATA_SIZE_INVALID = 145006
# hicann/ge's GeExecutor::SetDynamicDims and GetCurDynamicDims
GE_DYNAMIC_INPUT_LENGTH_INVALID = 145012
GE_DYNAMIC_BATCH_SIZE_INVALID = 145013
GE_INTERNAL_ERROR = 545000
GE_LOAD_TASK_PARTITION_FAILED = 545004


class Fault(Exception):
    """A call that fails; the caller of the simulated module sees only `code`.

    Args:
        code: What the call returns.
        reason: What was wrong, for `last_error`.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason

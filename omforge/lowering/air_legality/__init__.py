"""The law for GE graphs (.air), which GE's own loader does not enforce.

GE takes almost anything and fails late, in inference, engine choice or tiling, or never. Each rule
is one small function with what atc does, where that was read, and how sure it is.
"""

from omforge.lowering.air_legality.check_air import check_air, check_air_file, is_air
from omforge.lowering.air_legality.rules import AIR_RULE_IDS, AIR_RULES
from omforge.lowering.air_legality.subject import AirSubject

__all__ = ["AIR_RULES", "AIR_RULE_IDS", "AirSubject", "check_air", "check_air_file", "is_air"]

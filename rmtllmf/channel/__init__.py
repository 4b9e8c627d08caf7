"""The physical layer: everything between "s_q is sent" and "s_q hat comes out".

Draw an uplink (`UplinkScenario`), choose a jammer (`worst_case_covariance`, `strongest_user_covariance`,
`barrage_covariance`), choose a receiver (`sic`, `lmmse`), and send any mapping of name -> tensor over it: by the
Gaussian model of the link (`transmit`, or `transmit_sum` for the sum alone), or symbol by symbol (`transmit_symbols`).

What the base station can do about it on this layer: learn the noise (`covariance_of`, `estimated_covariance`,
`power_only_covariance`), combine blocks (`stack_blocks`, `repeat_block`), null directions (`null_directions`), control
powers (`channel_inversion`, `fractional_power_control`), or let users take turns (`scheduled`).

Other cells than the default one are made of path loss (`free_space`, `log_distance`, 3GPP's `uma`, `umi`, `rma` with
`los_probability`), `Rician` fading, correlation (`exponential_correlation`) and `Shadowing`. With the extra `sionna`,
`sionna_uplink` draws 3GPP's channels in full, and `ldpc_encode`, `ldpc_decode` are 5G's codes.

Powers are in W and ratios linear throughout; `db` and `dbm` make decibels of them, `from_db` and `from_dbm` lead back.
"""

from .code import LdpcCode
from .combining import repeat_block, stack_blocks
from .constellation import Constellation, symbol_error_rate
from .decibels import db, dbm, from_db, from_dbm
from .fading import Rician, Shadowing, exponential_correlation, steering_vector
from .imperfect import imperfect_channel
from .jammers import barrage_covariance, strongest_user_covariance
from .knowledge import covariance_of, estimated_covariance, power_only_covariance
from .min_max import min_max_rate_covariance
from .nulling import null_directions
from .path_loss import free_space, log_distance
from .path_loss_3gpp import los_probability, rma, uma, umi
from .power_control import channel_inversion, fractional_power_control
from .rate import sum_rate
from .receivers import lmmse, sic
from .reception import Reception
from .scenario import UplinkScenario
from .scheduling import scheduled
from .sionna import ldpc_decode, ldpc_encode, sionna_uplink
from .symbols import transmit_symbols
from .transmit import transmit
from .transmit_sum import transmit_sum
from .uplink import Uplink
from .worst_case import WorstCase, worst_case, worst_case_covariance, worst_case_rate

__all__ = [
    "Constellation",
    "LdpcCode",
    "Reception",
    "Rician",
    "Shadowing",
    "Uplink",
    "UplinkScenario",
    "WorstCase",
    "barrage_covariance",
    "channel_inversion",
    "covariance_of",
    "db",
    "dbm",
    "estimated_covariance",
    "exponential_correlation",
    "fractional_power_control",
    "free_space",
    "from_db",
    "from_dbm",
    "imperfect_channel",
    "ldpc_decode",
    "ldpc_encode",
    "lmmse",
    "log_distance",
    "los_probability",
    "min_max_rate_covariance",
    "null_directions",
    "power_only_covariance",
    "repeat_block",
    "rma",
    "scheduled",
    "sic",
    "sionna_uplink",
    "stack_blocks",
    "steering_vector",
    "strongest_user_covariance",
    "sum_rate",
    "symbol_error_rate",
    "transmit",
    "transmit_sum",
    "transmit_symbols",
    "uma",
    "umi",
    "worst_case",
    "worst_case_covariance",
    "worst_case_rate",
]

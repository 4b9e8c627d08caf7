"""The physical layer: everything between "s_q is sent" and "s_q hat comes out".

Draw an uplink (`UplinkScenario`), choose a jammer (`worst_case_covariance`, `strongest_user_covariance`,
`barrage_covariance`), choose a receiver (`sic`, `lmmse`), and send any mapping of name -> tensor over it (`transmit`).
"""

from .jammers import barrage_covariance, strongest_user_covariance
from .rate import sum_rate
from .receivers import Reception, lmmse, sic
from .scenario import UplinkScenario
from .transmit import transmit
from .uplink import Uplink
from .worst_case import WorstCase, worst_case, worst_case_covariance

__all__ = [
    "Reception",
    "Uplink",
    "UplinkScenario",
    "WorstCase",
    "barrage_covariance",
    "lmmse",
    "sic",
    "strongest_user_covariance",
    "sum_rate",
    "transmit",
    "worst_case",
    "worst_case_covariance",
]

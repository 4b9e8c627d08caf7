"""Figures: jammers, receivers, symbols, task vectors and their tasks, and the accuracy of fusions under attack.

The only part of the library that knows matplotlib, which is imported when a function is called. Every function takes
``ax=None`` and returns the Axes; without `ax` it draws on a figure of its own that pyplot does not know, to be saved
with ``ax.figure.savefig(...)``. In a notebook pass an Axes of ``matplotlib.pyplot.subplots()``.
"""

from .countermeasures import countermeasure_chart
from .disentanglement import disentanglement_map
from .distribution import mse_distribution
from .fusion import fusion_chart
from .heatmap import similarity_heatmap
from .pareto import pareto_front
from .symbols import constellation_plot
from .water import water_filling

__all__ = [
    "constellation_plot",
    "countermeasure_chart",
    "disentanglement_map",
    "fusion_chart",
    "mse_distribution",
    "pareto_front",
    "similarity_heatmap",
    "water_filling",
]

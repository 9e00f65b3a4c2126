"""The stages of a run: functions from package directories to package directories.

Each reads packages, writes one, and returns a flat report; the same functions are called by
`filterpress.compress`, by the command line and by the steps of the Kubeflow pipeline, and give the
same bytes in all three. A stage with nothing left to do copies its package. Whatever is imported
here is light: a stage imports what it needs when it runs.
"""

from filterpress.stages.checking import check as check
from filterpress.stages.deciding import check_thresholds as check_thresholds
from filterpress.stages.deciding import evaluate as evaluate
from filterpress.stages.deciding import give_up as give_up
from filterpress.stages.deciding import publish as publish
from filterpress.stages.handover import ENCODED as ENCODED
from filterpress.stages.learning import retrain as retrain
from filterpress.stages.learning import train as train
from filterpress.stages.searching import search as search
from filterpress.stages.shrinking import cluster as cluster
from filterpress.stages.shrinking import prune as prune
from filterpress.stages.shrinking import reduce as reduce
from filterpress.stages.tables import check_configs as check_configs
from filterpress.stages.tables import clusterers as clusterers
from filterpress.stages.tables import pruners as pruners
from filterpress.stages.tables import reducers as reducers
from filterpress.stages.telling import curve as curve
from filterpress.stages.telling import report as report

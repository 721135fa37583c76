"""One command for a machine with a GPU: are answers right there, how long do requests take, and what takes the time.

`python -m eval.gpu_check --out FOLDER` (`make gpu`) runs for at most eight minutes, in stages that are processes of
their own. `--rehearse` runs the same stages on a CPU, tiny, with a stand-in for the device.
"""

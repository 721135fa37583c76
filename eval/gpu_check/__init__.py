"""One command for a machine with a GPU: it checks answers, times requests, and shows where the time goes.

`python -m eval.gpu_check --out FOLDER` (`make gpu`) runs for at most eight minutes, with one process per stage.
`--rehearse` runs the same stages on a CPU at tiny sizes, with a stand-in for the device.
"""

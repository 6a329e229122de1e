"""The files of Distiller: configurations, checkpoints, parameters of layers."""

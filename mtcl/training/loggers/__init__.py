"""Take a run's curves and panels to TensorBoard, a CSV file, MLflow, Weights & Biases."""

from mtcl.training.loggers.base import MetricLogger
from mtcl.training.loggers.csv_logger import CsvLogger
from mtcl.training.loggers.mlflow_logger import MlflowLogger
from mtcl.training.loggers.tensorboard_logger import TensorBoardLogger
from mtcl.training.loggers.wandb_logger import WandbLogger

__all__ = ["CsvLogger", "MetricLogger", "MlflowLogger", "TensorBoardLogger", "WandbLogger"]

"""Watching what replicas see in real training."""

from syncbn.monitoring.callback import SyncMonitor
from syncbn.monitoring.report import LayerReport, MonitorReport
from syncbn.monitoring.watched import NotWatched

__all__ = ["LayerReport", "MonitorReport", "NotWatched", "SyncMonitor"]

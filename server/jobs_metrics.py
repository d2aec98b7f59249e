"""What /metrics tells of the jobs, looked up at the time of the scrape.

Labels are kept by whoever scrapes, so single jobs are told only while they are unfinished, and no more than MAX_TOLD of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.jobs import Jobs
from server.metrics import buckets

MAX_TOLD = 32
_STATES = ("validating", "in_progress", "paused", "finalizing", "cancelling")


class JobNumbers(Collector):
    """The jobs of one server."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        views = [view for view in self._jobs.summary() if view.state in _STATES]
        states = Counter(view.state for view in views)
        jobs = GaugeMetricFamily("sluice_batch_jobs", "Unfinished batches", labels=("state",))
        for state in _STATES:
            jobs.add_metric((state,), states[state])
        yield jobs
        totals = self._jobs.totals
        requests = CounterMetricFamily("sluice_batch_requests", "Lines of batches that got their record", labels=("status",))
        requests.add_metric(("completed",), totals.completed)
        requests.add_metric(("failed",), totals.failed)
        yield requests
        yield CounterMetricFamily(
            "sluice_batch_resume_skipped",
            "Lines that had their record when a batch was taken up again",
            value=totals.resume_skipped,
        )
        yield CounterMetricFamily(
            "sluice_batch_output_write_errors", "Times the disk refused what a batch had to write", value=totals.write_errors
        )
        syncs = totals.sync_seconds
        yield HistogramMetricFamily(
            "sluice_batch_output_fsync_seconds",
            "Time to make records of a batch durable",
            buckets=buckets(syncs.bounds, syncs.counts),
            sum_value=syncs.total,
        )
        waiting = [self._jobs.now() - view.created_at for view in views if not view.done]
        yield GaugeMetricFamily(
            "sluice_batch_oldest_pending_seconds", "Age of the oldest batch without an answer", value=max(waiting, default=0.0)
        )
        progress = GaugeMetricFamily(
            "sluice_batch_progress_ratio", "Lines of a batch that have their record", labels=("batch",)
        )
        eta = GaugeMetricFamily("sluice_batch_eta_seconds", "Until a batch is done, as planned", labels=("batch",))
        slack = GaugeMetricFamily(
            "sluice_batch_deadline_slack_seconds",
            "What is left of a batch's window when it is done; negative: it will miss it",
            labels=("batch",),
        )
        for view in views[:MAX_TOLD]:
            progress.add_metric((view.id,), view.progress)
            if view.eta_s is not None:
                eta.add_metric((view.id,), view.eta_s)
            if view.slack_s is not None:
                slack.add_metric((view.id,), view.slack_s)
        yield from (progress, eta, slack)

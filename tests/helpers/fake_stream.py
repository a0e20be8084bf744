"""Streams and events of a device that is not there, which log their calls."""


class FakeEvent:
    """An event, numbered in the order of recording."""

    def __init__(self, log):
        self.log, self.number = log, log.count("event")

    def synchronize(self):
        self.log.append(f"host waits for event {self.number}")

    def __str__(self):
        return "event"


class FakeStream:
    """A stream that logs its calls."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append("event")
        return FakeEvent(self.log)

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *error):
        self.log.append(f"off {self.name}")

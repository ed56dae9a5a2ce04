"""The supervisor of models that are loaded and unloaded: the API process orders which engines run."""

from collections import deque

from msgspec.structs import replace

from server.processes.child_process import Child, Clock, StopSignals, SupervisorError
from server.processes.supervised import SupervisedEngine
from server.processes.supervisor_channel import EngineGone, EngineStarted, Message, StartEngine, StopEngine
from server.settings.table import Settings
from server.supervisor import STOP_SECONDS, EngineLaunch, Supervisor


class OrderedEngine(SupervisedEngine):
    """An engine that can be stopped while the server goes on."""

    is_stopped = False  # it has been asked to end
    _kill_at: float | None = None  # when a process that was asked to end has had time enough

    def stop(self, seconds: float) -> None:
        """Ask the process to end, and kill it after `seconds`. No other one is started."""
        self.is_stopped, self._restarts, self._kill_at = True, False, self._clock.now() + seconds
        self._restart_at = None
        self.process.terminate()

    @property
    def deadline(self) -> float | None:
        return self._kill_at if self.is_stopped and not self.is_gone else super().deadline

    def advance(self) -> None:
        if self._kill_at is not None and self._clock.now() >= self._kill_at and not self.process.has_ended:
            self._kill_at = None
            self.process.kill()
        super().advance()


class OrderedSupervisor(Supervisor):
    """Starts and stops engines as the coordinator wants. It goes on without any."""

    engine_type = OrderedEngine
    needs_engines = False

    def __init__(self, signals: StopSignals, settings: Settings, clock: Clock) -> None:
        super().__init__(signals, settings, clock)
        self._launches: dict[int, EngineLaunch] = {}
        self._orders: deque[StartEngine | StopEngine] = deque()  # to be carried out

    def add_engine(self, number: int, launch: EngineLaunch) -> int | None:
        self._launches[number] = launch
        return None

    def _note(self, message: Message) -> None:
        super()._note(message)
        if isinstance(message, StartEngine | StopEngine):
            self._orders.append(message)

    def _carry_out_orders(self) -> None:
        while self._orders:
            self._obey(self._orders.popleft())

    def _obey(self, order: StartEngine | StopEngine) -> None:
        """Start or stop an engine. The coordinator is told once when one that is stopped has ended."""
        running = [engine for engine in self._engines if engine.number == order.number]
        if isinstance(order, StopEngine):
            for engine in running:
                assert isinstance(engine, OrderedEngine)
                engine.stop(STOP_SECONDS)
        elif running:
            self._tell(EngineStarted(order.number, running[0].process.pid))
        else:
            try:
                process = self._start(order)
            except SupervisorError as error:
                self._tell(EngineGone(order.number, str(error)))
            else:
                self._tell(EngineStarted(order.number, process.pid))

    def _start(self, order: StartEngine) -> Child:
        """Start an engine, which may use so much host memory. Raises SupervisorError."""
        launch = self._launches[order.number]
        config = replace(launch.config, config=replace(launch.config.config, memory_limit=order.memory_limit))
        return self.start_engine(order.number, launch._replace(config=config))

    def _report_loss(self, engine: SupervisedEngine) -> None:
        assert isinstance(engine, OrderedEngine)
        if not engine.is_stopped:
            super()._report_loss(engine)

//! The loop around the controller: waits for inputs, does I/O, reads the clock.

use std::sync::Arc;

use portolan_core::{model::Finding, store::Update, table::PinnedState};
use portolan_datapath::Datapath;
use tokio::sync::mpsc;

use super::{
    Action, Controller, Input, MAX_OUTCOMES, Now, Request, Start,
    effect::Unconfirmed,
    state_file::{PersistedState, Saved, StateWriter},
};
use crate::{
    error::Result,
    probe::{
        Prober,
        confirm::{Confirmation, Confirmer},
        self_probe::{Seen, SelfProbe, SelfProbeHandle},
    },
};

/// What does the controller's I/O, and how its results come back.
pub struct Io {
    prober: Prober,
    confirmer: Confirmer,
    confirmations: mpsc::UnboundedReceiver<Confirmation>,
    self_probe: SelfProbeHandle,
    self_probe_results: mpsc::Receiver<Seen>,
    writer: StateWriter,
    saved: mpsc::UnboundedReceiver<Saved>,
    names: mpsc::UnboundedSender<(Unconfirmed, Option<String>)>,
    named: mpsc::UnboundedReceiver<(Unconfirmed, Option<String>)>,
    /// Records findings as Kubernetes Events.
    recorder: Option<mpsc::Sender<Finding>>,
}

impl Io {
    /// Starts the self-probe, which waits for its first request. Must be called from within a Tokio runtime.
    pub fn start(
        prober: Prober,
        self_probe: SelfProbe,
        (writer, saved): (StateWriter, mpsc::UnboundedReceiver<Saved>),
        recorder: Option<mpsc::Sender<Finding>>,
    ) -> Self {
        let (confirmer, confirmations) = Confirmer::new();
        let (names, named) = mpsc::unbounded_channel();
        let (self_probe, self_probe_results) = self_probe.start();
        Self { prober, confirmer, confirmations, self_probe, self_probe_results, writer, saved, names, named, recorder }
    }

    /// Does the I/O of an action. Results arrive as inputs.
    fn perform(&self, action: Action, kernel: &Datapath) {
        match action {
            Action::Confirm { endpoint, probe } => self.confirmer.ask(endpoint, probe),
            Action::Probe { target, number } => self.prober.set(target, number),
            // Best effort: a recorder that is busy loses Events, and not the log.
            Action::RecordFinding(finding) => {
                if let Some(recorder) = &self.recorder {
                    let _ = recorder.try_send(finding);
                }
            }
            Action::SelfProbe => self.self_probe.run_now(),
            Action::Save { id, state } => self.writer.save(id, state),
            Action::NameNamespace(unconfirmed) => {
                let (names, helper) = (self.names.clone(), kernel.helper.clone());
                tokio::task::spawn_blocking(move || {
                    let name = helper.name_namespace(unconfirmed.client);
                    // An error means that the agent is shutting down.
                    let _ = names.send((unconfirmed, name));
                });
            }
        }
    }
}

impl Start {
    /// What an agent starts from whose self-probe and prober are these.
    pub fn of(
        pinned: PinnedState,
        persisted: Result<Option<PersistedState>, crate::error::StateFileError>,
        self_probe: &SelfProbe,
        prober: &Prober,
    ) -> Self {
        Self {
            pinned,
            persisted: persisted.map_err(|error| error.to_string()),
            self_probe: (self_probe.table(), self_probe.endpoint()),
            probe_counts: Arc::clone(&prober.counts),
        }
    }
}

/// Runs the controller until the sources or the admin socket have gone.
///
/// # Errors
/// Returns an error if the kernel's signals end, or if the controller cannot go on.
pub async fn run(
    mut controller: Controller<Datapath>,
    mut io: Io,
    mut updates: mpsc::Receiver<Vec<Update>>,
    mut requests: mpsc::Receiver<Request>,
) -> Result<()> {
    loop {
        let timeout = controller.poll_timeout(Now::read());
        let timeout = async {
            match timeout {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let kernel = controller.kernel_mut();
        let logs = async {
            match &mut kernel.logs {
                Some(logs) => logs.forward().await,
                None => std::future::pending().await,
            }
        };
        let input = tokio::select! {
            batch = updates.recv() => {
                let Some(mut batch) = batch else { return Ok(()) };
                while let Ok(more) = updates.try_recv() {
                    batch.extend(more);
                }
                Input::Updates(batch)
            }
            outcomes = kernel.events.next(MAX_OUTCOMES) => {
                let outcomes = outcomes?;
                Input::Outcomes { drained: outcomes.len() < MAX_OUTCOMES, outcomes }
            }
            Some(confirmation) = io.confirmations.recv() => Input::Confirmation(confirmation),
            Some(report) = io.prober.found.recv() => Input::ProbeReport(report),
            Some((unconfirmed, name)) = io.named.recv() => Input::NamespaceName(unconfirmed, name),
            Some((id, result)) = io.saved.recv() => Input::Saved(id, result),
            Some(seen) = io.self_probe_results.recv() => Input::SelfProbe(seen),
            epoch = kernel.grace.elapsed() => Input::GraceElapsed(epoch),
            report = kernel.terminator.next_report() => Input::Sweep(report?),
            request = requests.recv() => {
                let Some(request) = request else { return Ok(()) };
                Input::Request(request)
            }
            () = timeout => Input::Timeout,
            failed = logs => return Ok(failed?),
        };
        let started = Now::read();
        controller.handle(started, input)?;
        let publications = controller.take_publications();
        if !publications.is_empty() {
            let ended = Now::read();
            for publication in publications {
                controller.record_publication(ended, publication, ended.instant - started.instant);
                if publication.first {
                    return_memory();
                }
            }
        }
        for action in controller.take_actions() {
            io.perform(action, controller.kernel());
        }
    }
}

/// Returns memory to the system that reading and compiling everything took, and that is not needed again.
fn return_memory() {
    // SAFETY: it may be called at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

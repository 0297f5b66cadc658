//! Active probes: who is to be probed, and what was found.

use portolan_core::{
    health::Target,
    model::{Code, Finding},
};

use super::{Reconciler, event_log::Event};
use crate::probe::Probed;

impl Reconciler {
    /// Tells the one who probes what is wanted by now.
    pub(super) fn probe_wanted(&mut self) {
        for (target, wanted) in self.health.probes_wanted() {
            self.prober.set(target, wanted);
        }
    }

    /// An endpoint is found to be otherwise than before. Whether that changes a service.
    pub(super) fn record_probe(&mut self, probed: Probed) -> bool {
        let Probed { target, number, failing } = probed;
        let Target { endpoint, probe } = &target;
        // What is a Service's address as well is rewritten: who answered is not known.
        if failing.is_some() && self.is_frontend(&probe.dialled(*endpoint)) {
            tracing::warn!(
                "{endpoint}: {probe} fails, and goes to a Service's address, so it says nothing of the endpoint"
            );
            return false;
        }
        let pools = self.health.record_probe(&target, number, failing.clone());
        for pool in &pools {
            let (kind, message) = match &failing {
                Some(why) => (
                    Event::UNHEALTHY,
                    format!("{endpoint}: {probe} failed {} times in a row, the last time with: {why}", probe.failures),
                ),
                None => (Event::HEALTHY, format!("{endpoint}: {probe} passed {} times in a row", probe.successes)),
            };
            self.events.add(Event::of_pool(pool, *endpoint, kind, message));
            self.changes.services.insert(pool.service.clone());
        }
        !pools.is_empty()
    }

    /// Where more is asked for than is allowed.
    pub(super) fn findings_of_probes(&self) -> Option<Finding> {
        let (targets, _, asked) = self.health.probes();
        let most = self.prober.per_second;
        (asked > f64::from(most)).then(|| {
            let what = if most == 0 {
                "none is made".to_owned()
            } else {
                format!("{most} are made, so that each endpoint waits longer than its periodSeconds")
            };
            let message = format!(
                "portolan.io/probe asks for {asked:.0} probes a second of {targets} endpoints; {what} (--probes-per-second)"
            );
            Finding::new(Code::ProbesBounded, "Probes", message)
        })
    }
}

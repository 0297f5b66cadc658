//! When the state that outlives the agent is saved, and who waits for it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::now::Now;

/// The minimum time between two saves: a burst of ejections is saved once.
const MIN_SAVE_INTERVAL: Duration = Duration::from_millis(200);
/// The minimum time after a save that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// How long an operator waits for a disk.
const SAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// The reply to an operator: what was done, or why not.
pub(super) type Reply = oneshot::Sender<Result<String, String>>;

/// Replies that wait for a save.
#[derive(Debug)]
struct InFlight {
    deadline: Instant,
    replies: Vec<(String, Reply)>,
}

/// What is to be saved, and what is being saved.
#[derive(Debug, Default)]
pub(super) struct Persistence {
    dirty: bool,
    /// Whether the last save failed.
    failed: bool,
    saved_at: Option<Instant>,
    /// Overrides that are in effect and wait for the next save.
    replies: Vec<(String, Reply)>,
    in_flight: BTreeMap<u64, InFlight>,
    next_id: u64,
}

impl Persistence {
    /// Notes that there is something new to save.
    pub(super) fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    /// Replies with `message` once the override is saved, or could not be.
    pub(super) fn reply_when_saved(&mut self, message: String, reply: Reply) {
        self.dirty = true;
        self.replies.push((message, reply));
    }

    /// Returns when [`Self::begin_save`] or [`Self::handle_timeout`] wants to be called.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let save = self.saved_at.filter(|_| self.dirty).map(|at| at + self.interval());
        save.into_iter().chain(self.in_flight.values().map(|save| save.deadline)).min()
    }

    fn interval(&self) -> Duration {
        if self.failed { RETRY_INTERVAL } else { MIN_SAVE_INTERVAL }
    }

    /// Returns the id of the save to begin, if one is due: at once if an operator waits.
    ///
    /// `unpublished` says why the kernel does not hold the current state yet; the replies mention it.
    pub(super) fn begin_save(&mut self, now: Now, unpublished: Option<&str>) -> Option<u64> {
        let rested = self.saved_at.is_none_or(|at| at + self.interval() <= now.instant);
        if self.replies.is_empty() && !(self.dirty && rested) {
            return None;
        }
        (self.dirty, self.saved_at) = (false, Some(now.instant));
        let suffix = unpublished.map(|why| format!("; but the kernel does not hold it yet: {why}")).unwrap_or_default();
        let mut replies = std::mem::take(&mut self.replies);
        replies.iter_mut().for_each(|(message, _)| message.push_str(&suffix));
        let id = self.next_id;
        self.next_id += 1;
        if !replies.is_empty() {
            self.in_flight.insert(id, InFlight { deadline: now.instant + SAVE_TIMEOUT, replies });
        }
        Some(id)
    }

    /// Handles the result of a save.
    pub(super) fn on_saved(&mut self, id: u64, result: Result<(), String>) {
        self.failed = result.is_err();
        // A later save holds what is current by then.
        self.dirty |= self.failed;
        if let Some(save) = self.in_flight.remove(&id) {
            reply(save.replies, result.err().as_deref());
        }
    }

    /// Replies to those who have waited long enough.
    pub(super) fn handle_timeout(&mut self, now: Now) {
        for (_, save) in self.in_flight.extract_if(.., |_, save| save.deadline <= now.instant) {
            reply(save.replies, Some("timed out"));
        }
    }
}

fn reply(replies: Vec<(String, Reply)>, error: Option<&str>) {
    for (mut message, reply) in replies {
        if let Some(error) = error {
            message += &format!("; but it is lost when the agent restarts: {error}");
        }
        // An operator may have gone away.
        let _ = reply.send(Ok(message));
    }
}

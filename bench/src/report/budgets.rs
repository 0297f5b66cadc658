//! What was promised, held against what was measured.

use serde::Serialize;

use super::{Report, of_median, with_interval};
use crate::{
    figures::{Median, ratio},
    reaction::Death,
};

/// What was promised, and what was measured.
#[derive(Serialize)]
pub(super) struct Budget {
    pub(super) what: String,
    pub(super) goal: String,
    pub(super) measured: String,
    pub(super) verdict: PolicyOutput,
}

/// Whether it was held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum PolicyOutput {
    Met,
    NotMet,
    /// The goal lies within the interval: it cannot be told.
    Open,
}

impl PolicyOutput {
    fn of(met: bool) -> Self {
        if met { Self::Met } else { Self::NotMet }
    }

    /// Whether a figure is surely at most, or surely more than that.
    fn at_most(figure: Median, goal: f64) -> Self {
        match figure.interval {
            Some((_, high)) if high <= goal => Self::Met,
            Some((low, _)) if low > goal => Self::NotMet,
            _ => Self::Open,
        }
    }

    /// The other way round.
    fn at_least(figure: Median, goal: f64) -> Self {
        match figure.interval {
            Some((low, _)) if low >= goal => Self::Met,
            Some((_, high)) if high < goal => Self::NotMet,
            _ => Self::Open,
        }
    }

    /// Whether a ratio is surely 1, by three in a hundred.
    fn equal(ratio: Median) -> Self {
        match ratio.interval {
            Some((low, high)) if low >= 0.97 && high <= 1.03 => Self::Met,
            Some((low, high)) if low > 1.03 || high < 0.97 => Self::NotMet,
            _ => Self::Open,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::Open => "cannot be told",
        }
    }
}

impl Report {
    /// Holds the figures against the budgets.
    pub(crate) fn judge(&mut self) {
        let mut budgets = Vec::new();
        let mut add = |what: String, goal: String, measured: String, verdict: PolicyOutput| {
            budgets.push(Budget { what, goal, measured, verdict });
        };
        let arm = |name: &str| self.arms.iter().find(|arm| arm.name == name && !arm.rounds.is_empty());
        let services: Vec<u32> = self.agents.iter().map(|agent| agent.services).collect();
        let ends = services.first().into_iter().chain(services.last().filter(|_| services.len() > 1));
        for services in ends {
            let Some(hit) = arm(&format!("hit, {services}")) else { continue };
            for (measure, of) in [("connect p50", "p50"), ("connect p99", "p99")] {
                if let Some(ratio) = hit.ratios.get(measure) {
                    let what = format!("connect() through Portolan / direct, {of}, {services} services");
                    add(what, "≤ 1.05".to_owned(), with_interval(*ratio), PolicyOutput::at_most(*ratio, 1.05));
                }
            }
            if let Some(ratio) = arm(&format!("nftables, {services}")).and_then(|dnat| ratio(dnat, hit, "connect p50"))
            {
                let what = format!("connect() by DNAT (nftables) / through Portolan, p50, {services} services");
                add(what, "≥ 3".to_owned(), with_interval(ratio), PolicyOutput::at_least(ratio, 3.0));
            }
        }
        if let Some(hit) = services.first().and_then(|first| arm(&format!("hit, {first}"))) {
            for proxy in ["Envoy", "HAProxy"] {
                if let Some(ratio) = arm(proxy).and_then(|proxy| ratio(hit, proxy, "requests per second")) {
                    let what =
                        format!("connections per second, one request each, one client, through Portolan / {proxy}");
                    add(what, "≥ 3".to_owned(), with_interval(ratio), PolicyOutput::at_least(ratio, 3.0));
                }
            }
            for measure in ["round trip p50", "MiB per second"] {
                if let Some(ratio) = hit.ratios.get(measure) {
                    let what = format!("{measure} on an open connection / direct");
                    add(what, "no difference (3 %)".to_owned(), with_interval(*ratio), PolicyOutput::equal(*ratio));
                }
            }
        }
        // The programs that look at packets are attached where a rule counts errors of HTTP ports: with one service, none does.
        if let (Some(first), Some(last)) = (services.first(), services.last())
            && let (Some(without), Some(with)) = (arm(&format!("hit, {first}")), arm(&format!("hit, {last}")))
            && *first == 1
            && *last > 1
        {
            let what = |measure: &str| {
                format!(
                    "{measure} of a connection that no rule looks at, while those of others are looked at / while none is"
                )
            };
            if let Some(ratio) = ratio(with, without, "round trip p50") {
                let verdict = PolicyOutput::at_most(ratio, 1.03);
                add(what("round trip p50"), "≤ 1.03".to_owned(), with_interval(ratio), verdict);
            }
            if let Some(ratio) = ratio(with, without, "MiB per second") {
                let verdict = PolicyOutput::at_least(ratio, 0.97);
                add(what("MiB per second"), "≥ 0.97".to_owned(), with_interval(ratio), verdict);
            }
        }
        for row in self.kernel.iter().filter(|row| row.services == 1 && row.threads == 1 || row.services > 1) {
            let net = |figure: f64| format!("{figure:.0} ns, of which {:.0} ns are the counting", row.nothing);
            let what = format!("connect4 in the kernel, a hit, {} services", row.services);
            add(what, "≤ 300 ns".to_owned(), net(row.hit), PolicyOutput::of(row.hit <= 300.0));
            let what = format!("connect4 in the kernel, a miss, {} services", row.services);
            add(what, "≤ 100 ns".to_owned(), net(row.miss), PolicyOutput::of(row.miss <= 100.0));
        }
        // The most services, with rules for all of them.
        if let Some(last) = self.tables.iter().rev().find(|row| row.rules < row.services) {
            let what = format!("one endpoint changed to published, p99, {} services", last.services);
            add(
                what,
                "≤ 1 ms".to_owned(),
                format!("{:.3} ms", last.change[1]),
                PolicyOutput::of(last.change[1] <= 1.0),
            );
            let what = format!("full table from empty, {} services, {} endpoints", last.services, last.endpoints);
            let whole = last.policy + last.written;
            add(what, "≤ 1 s".to_owned(), format!("{whole:.2} s"), PolicyOutput::of(whole <= 1.0));
        }
        if let Some(own) = self.reaction.iter().find(|one| one.who == "Portolan" && one.death == Death::Refused) {
            let what = "an endpoint refuses: until the last request to it begins".to_owned();
            add(
                what,
                "≤ 5 ms".to_owned(),
                format!("{} ms", of_median(own.last, 1)),
                PolicyOutput::at_most(own.last, 5.0),
            );
        }
        if let Some(failing) = &self.failing {
            let what = format!("from a failure to the table without the endpoint, p99 of {}", failing.single);
            let within = failing.single_within[1];
            add(what, "≤ 5 ms".to_owned(), format!("within {within:.1} ms"), PolicyOutput::of(within <= 5.0));
        }
        if let Some(last) = self.agents.last() {
            let what = format!("agent's memory, {} endpoints", last.endpoints);
            add(what, "≤ 150 MiB".to_owned(), format!("{:.0} MiB", last.mib), PolicyOutput::of(last.mib <= 150.0));
            let what = "agent's processor time while nothing changes".to_owned();
            add(
                what,
                "≈ 0".to_owned(),
                format!("{:.2} % of one", last.idle * 100.0),
                PolicyOutput::of(last.idle <= 0.01),
            );
        }
        for away in &self.away {
            let what = format!("failed requests while the agent is {}", away.what);
            add(
                what,
                "0".to_owned(),
                format!("{} of {}", away.failed, away.requests),
                PolicyOutput::of(away.failed == 0),
            );
        }
        self.budgets = budgets;
    }
}

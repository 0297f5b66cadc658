//! Performance budgets, and whether the measured figures meet them.

use serde::Serialize;

use super::{Report, of_median, with_interval};
use crate::{
    connections::{DIRECT, DIRECT_IN_TURN},
    figures::{Median, added, ratio},
    paths::UDP,
    reaction::Death,
};

/// One budget with its measured figure, as text for the report.
#[derive(Serialize)]
pub(super) struct Budget {
    pub(super) what: String,
    pub(super) goal: String,
    pub(super) measured: String,
    pub(super) verdict: Verdict,
}

/// Whether a figure meets its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Verdict {
    Met,
    NotMet,
    /// Inconclusive: the goal lies within the confidence interval, or there is none.
    Open,
}

impl Verdict {
    fn of(met: bool) -> Self {
        if met { Self::Met } else { Self::NotMet }
    }

    /// Checks an upper limit against the confidence interval.
    fn at_most(figure: Median, goal: f64) -> Self {
        match figure.interval {
            Some((_, high)) if high <= goal => Self::Met,
            Some((low, _)) if low > goal => Self::NotMet,
            _ => Self::Open,
        }
    }

    /// Checks a lower limit against the confidence interval.
    fn at_least(figure: Median, goal: f64) -> Self {
        match figure.interval {
            Some((low, _)) if low >= goal => Self::Met,
            Some((_, high)) if high < goal => Self::NotMet,
            _ => Self::Open,
        }
    }

    /// Checks that a ratio is 1, with a tolerance of 3 %.
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
            Self::Open => "inconclusive",
        }
    }
}

impl Report {
    /// Returns what Portolan adds to connect(), as a part of what DNAT adds, with this many services.
    pub(super) fn added_beside_dnat(&self, services: u32) -> Vec<(String, Median)> {
        let arm = |name: &str| self.arms.iter().find(|arm| arm.name == name && !arm.rounds.is_empty());
        let kinds = [("hit", "nftables", DIRECT), ("hit in turn", "nftables in turn", DIRECT_IN_TURN)];
        let ratios = kinds.into_iter().filter_map(|(kind, dnat, direct)| {
            let (hit, dnat) = (arm(&format!("{kind}, {services}"))?, arm(&format!("{dnat}, {services}"))?);
            let what =
                format!("added to connect(), through Portolan / DNAT (nftables), p50, {kind}, {services} services");
            Some((what, added(hit, dnat, arm(direct)?, "connect p50")?))
        });
        ratios.collect()
    }

    /// Evaluates all budgets on the figures so far.
    pub(crate) fn judge(&mut self) {
        let mut budgets = Vec::new();
        let mut add = |what: String, goal: String, measured: String, verdict: Verdict| {
            budgets.push(Budget { what, goal, measured, verdict });
        };
        let arm = |name: &str| self.arms.iter().find(|arm| arm.name == name && !arm.rounds.is_empty());
        let services: Vec<u32> = self.agents.iter().map(|agent| agent.services).collect();
        let ends: Vec<u32> =
            services.first().into_iter().chain(services.last().filter(|_| services.len() > 1)).copied().collect();
        for services in &ends {
            for (kind, goal) in [("hit", 1.02), ("hit in turn", 1.06), ("miss", 1.01)] {
                if let Some(ratio) = arm(&format!("{kind}, {services}")).and_then(|arm| arm.ratios.get("connect p50")) {
                    let what = format!("connect() / direct, p50, {kind}, {services} services");
                    add(what, format!("≤ {goal}"), with_interval(*ratio), Verdict::at_most(*ratio, goal));
                }
            }
            for (what, ratio) in self.added_beside_dnat(*services) {
                add(what, "≤ 0.10".to_owned(), with_interval(ratio), Verdict::at_most(ratio, 0.1));
            }
        }
        if let Some(hit) = services.first().and_then(|first| arm(&format!("hit, {first}"))) {
            for proxy in ["Envoy", "HAProxy"] {
                if let Some(ratio) = arm(proxy).and_then(|proxy| ratio(hit, proxy, "requests per second")) {
                    let what =
                        format!("requests per second, one connection each, one client, through Portolan / {proxy}");
                    add(what, "≥ 3".to_owned(), with_interval(ratio), Verdict::at_least(ratio, 3.0));
                }
            }
            for measure in ["round trip p50", "MiB per second"] {
                if let Some(ratio) = hit.ratios.get(measure) {
                    let what = format!("{measure} on an open connection / direct");
                    add(what, "no difference (3 %)".to_owned(), with_interval(*ratio), Verdict::equal(*ratio));
                }
            }
        }
        // Packet inspection is attached only if a rule counts HTTP errors. With one Service, none does.
        if let (Some(first), Some(last)) = (services.first(), services.last())
            && let (Some(without), Some(with)) = (arm(&format!("hit, {first}")), arm(&format!("hit, {last}")))
            && *first == 1
            && *last > 1
        {
            let what = |measure: &str| {
                format!(
                    "{measure} of an uninspected connection, with packet inspection for other connections / without"
                )
            };
            if let Some(ratio) = ratio(with, without, "round trip p50") {
                let verdict = Verdict::at_most(ratio, 1.03);
                add(what("round trip p50"), "≤ 1.03".to_owned(), with_interval(ratio), verdict);
            }
            if let Some(ratio) = ratio(with, without, "MiB per second") {
                let verdict = Verdict::at_least(ratio, 0.97);
                add(what("MiB per second"), "≥ 0.97".to_owned(), with_interval(ratio), verdict);
            }
        }
        for row in self.kernel.iter().filter(|row| row.services == 1 && row.threads == 1 || row.services > 1) {
            let services = row.services;
            let each = row.endpoints / services;
            for (what, ratio, own, floor) in [
                ("hit", row.hit_to_floor, row.hit, row.floor_hit),
                ("miss", row.miss_to_floor, row.miss, row.floor_miss),
            ] {
                let measured = format!("{} ({:.0} / {:.0} ns)", with_interval(ratio), own.median, floor.median);
                let what =
                    format!("connect4 run time / floor, {what}, {services} services of {each} endpoints in turn");
                add(what, "≤ 1.1".to_owned(), measured, Verdict::at_most(ratio, 1.1));
            }
            let goal = if services == 1 { 300.0 } else { 900.0 };
            let what = format!(
                "all hooks of one connection with one request, {services} services of {each} endpoints in turn"
            );
            for (cpus, ns) in [("two CPUs", row.connection), ("one CPU", row.connection_on_one_cpu)] {
                let (what, measured) = (format!("{what}, {cpus}"), format!("{} ns", of_median(ns, 0)));
                add(what, format!("≤ {goal} ns"), measured, Verdict::at_most(ns, goal));
            }
        }
        if let Some(way) = self.ways.iter().find(|way| way.what == UDP) {
            let measured = format!("{} ns", of_median(way.call, 0));
            add(
                "connect4 run time, connected UDP, hit".to_owned(),
                "≤ 250 ns".to_owned(),
                measured,
                Verdict::at_most(way.call, 250.0),
            );
        }
        // The last row without a DestinationRule per Service: the largest table with only the shared rules.
        if let Some(last) = self.tables.iter().rev().find(|row| row.rules < row.services) {
            let what = format!("endpoint change to publication, p99, {} services", last.services);
            add(what, "≤ 1 ms".to_owned(), format!("{:.3} ms", last.change[1]), Verdict::of(last.change[1] <= 1.0));
            let what = format!("full table from scratch, {} services, {} endpoints", last.services, last.endpoints);
            let whole = last.policy + last.written;
            add(what, "≤ 1 s".to_owned(), format!("{whole:.2} s"), Verdict::of(whole <= 1.0));
        }
        if let Some(own) = self.reaction.iter().find(|one| one.who == "Portolan" && one.death == Death::Refused) {
            let what = "endpoint refuses connects: time until the last failing request starts".to_owned();
            add(what, "≤ 5 ms".to_owned(), format!("{} ms", of_median(own.last, 1)), Verdict::at_most(own.last, 5.0));
        }
        if let Some(failing) = &self.failing {
            let what = format!("failure to publication without the endpoint, p99 of {}", failing.single);
            let within = failing.single_within[1];
            add(what, "≤ 5 ms".to_owned(), format!("within {within:.1} ms"), Verdict::of(within <= 5.0));
        }
        if let Some(last) = self.agents.last() {
            let what = format!("agent memory, {} endpoints", last.endpoints);
            add(what, "≤ 150 MiB".to_owned(), format!("{:.0} MiB", last.mib), Verdict::of(last.mib <= 150.0));
            let what = "idle agent, CPU time".to_owned();
            add(
                what,
                "≈ 0".to_owned(),
                format!("{:.2} % of one CPU", last.idle * 100.0),
                Verdict::of(last.idle <= 0.01),
            );
        }
        for away in &self.away {
            let what = format!("failed requests while the agent is {}", away.what);
            add(what, "0".to_owned(), format!("{} of {}", away.failed, away.requests), Verdict::of(away.failed == 0));
        }
        self.budgets = budgets;
    }
}

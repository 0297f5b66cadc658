//! DNAT as kube-proxy does it: rules in the form of its nftables and iptables modes.

use std::{
    fmt::Write as _,
    io::Write as _,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use portolan_tests::Namespace;

use crate::{
    served::OTHER_PORT,
    world::{self, ENDPOINT_PORT, SERVICE, SERVICE_PORT},
};

/// Number of endpoints of each Service that clients dial only in turn.
/// With ten, iptables would have half a million rules at 10,000 Services.
pub(crate) const ENDPOINTS: u32 = 2;

/// One port of a Service, with the addresses behind it.
struct Service {
    address: String,
    protocol: &'static str,
    port: u16,
    endpoints: Vec<(String, u16)>,
}

/// Returns `count` Services, with the dialed one in the middle.
/// kube-proxy's order is unrelated to traffic, so the middle is the average position in a list of rules.
fn services(count: u32) -> Vec<Service> {
    let dotted = |address: [u8; 4]| std::net::Ipv4Addr::from(address).to_string();
    let other = |i: u32| Service {
        address: dotted((0xac11_0000 + i).to_be_bytes()),
        protocol: "tcp",
        port: 80,
        endpoints: (0..ENDPOINTS)
            .map(|e| (dotted((0x0a01_0000 + i * ENDPOINTS + e).to_be_bytes()), OTHER_PORT))
            .collect(),
    };
    let own = |protocol, more: u16| Service {
        address: dotted(SERVICE),
        protocol,
        port: if protocol == "udp" { 53 } else { SERVICE_PORT + more },
        endpoints: world::ENDPOINTS.iter().map(|address| (dotted(*address), ENDPOINT_PORT + more)).collect(),
    };
    let mut all: Vec<Service> = (1..count).map(other).collect();
    let middle = all.len() / 2;
    all.splice(middle..middle, [own("tcp", 0), own("tcp", 1), own("tcp", 2), own("udp", 0)]);
    all
}

/// Installs the rules of kube-proxy's nftables mode: one verdict map, and a chain per Service and per endpoint.
pub(crate) fn nftables(namespace: &Namespace, count: u32) -> Result<()> {
    let services = services(count);
    let mut rules = String::from("add table ip kube-proxy\n");
    let chains = [
        ("nat-prerouting", "{ type nat hook prerouting priority -100 ; }"),
        ("nat-output", "{ type nat hook output priority -100 ; }"),
        ("nat-postrouting", "{ type nat hook postrouting priority 100 ; }"),
        ("filter-output", "{ type filter hook output priority -110 ; }"),
        ("services", ""),
        ("mark-for-masquerade", ""),
        ("masquerading", ""),
        ("service-endpoints-check", ""),
    ];
    for (name, hook) in chains {
        writeln!(rules, "add chain ip kube-proxy {name} {hook}")?;
    }
    let key = "type ipv4_addr . inet_proto . inet_service : verdict ;";
    writeln!(rules, "add map ip kube-proxy service-ips {{ {key} }}")?;
    writeln!(rules, "add map ip kube-proxy no-endpoint-services {{ {key} }}")?;
    for (i, service) in services.iter().enumerate() {
        writeln!(rules, "add chain ip kube-proxy service-{i}")?;
        for e in 0..service.endpoints.len() {
            writeln!(rules, "add chain ip kube-proxy endpoint-{i}-{e}")?;
        }
    }
    for (chain, rule) in [
        ("nat-prerouting", "jump services"),
        ("nat-output", "jump services"),
        ("nat-postrouting", "jump masquerading"),
        ("filter-output", "ct state new jump service-endpoints-check"),
        ("service-endpoints-check", "ip daddr . meta l4proto . th dport vmap @no-endpoint-services"),
        ("services", "ip daddr . meta l4proto . th dport vmap @service-ips"),
        ("mark-for-masquerade", "mark set mark or 0x4000"),
        ("masquerading", "mark and 0x4000 == 0 return"),
        ("masquerading", "mark set mark xor 0x4000"),
        ("masquerading", "masquerade fully-random"),
    ] {
        writeln!(rules, "add rule ip kube-proxy {chain} {rule}")?;
    }
    for (i, Service { address, protocol, port, endpoints }) in services.iter().enumerate() {
        let pick: Vec<String> = (0..endpoints.len()).map(|e| format!("{e} : goto endpoint-{i}-{e}")).collect();
        writeln!(
            rules,
            "add rule ip kube-proxy service-{i} ip daddr {address} {protocol} dport {port} ip saddr != 192.168.0.0/16 jump mark-for-masquerade"
        )?;
        writeln!(
            rules,
            "add rule ip kube-proxy service-{i} numgen random mod {} vmap {{ {} }}",
            pick.len(),
            pick.join(", ")
        )?;
        for (e, (to, to_port)) in endpoints.iter().enumerate() {
            writeln!(rules, "add rule ip kube-proxy endpoint-{i}-{e} ip saddr {to} jump mark-for-masquerade")?;
            writeln!(rules, "add rule ip kube-proxy endpoint-{i}-{e} meta l4proto {protocol} dnat to {to}:{to_port}")?;
        }
    }
    let element = |(i, service): (usize, &Service)| {
        format!("{} . {} . {} : goto service-{i}", service.address, service.protocol, service.port)
    };
    for some in services.iter().enumerate().map(element).collect::<Vec<_>>().chunks(1000) {
        writeln!(rules, "add element ip kube-proxy service-ips {{ {} }}", some.join(", "))?;
    }
    feed(namespace, &["nft", "-f", "-"], &rules)
}

/// Installs the rules of kube-proxy's iptables mode: one list of all Services.
/// The first packet of each connection traverses it from the beginning.
pub(crate) fn iptables(namespace: &Namespace, count: u32) -> Result<()> {
    let services = services(count);
    let mut chains = String::from("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n");
    let mut rules = String::from(
        "-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n",
    );
    for (i, Service { address, protocol, port, endpoints }) in services.iter().enumerate() {
        writeln!(chains, ":KUBE-SVC-{i} - [0:0]")?;
        let about = format!("-m comment --comment \"default/service-{i}:http cluster IP\"");
        let matches = format!("-d {address}/32 -p {protocol} {about} -m {protocol} --dport {port}");
        writeln!(rules, "-A KUBE-SERVICES {matches} -j KUBE-SVC-{i}")?;
        writeln!(rules, "-A KUBE-SVC-{i} ! -s 192.168.0.0/16 {matches} -j KUBE-MARK-MASQ")?;
        for (e, (to, to_port)) in endpoints.iter().enumerate() {
            writeln!(chains, ":KUBE-SEP-{i}-{e} - [0:0]")?;
            let left = endpoints.len() - e;
            let chance = if left == 1 {
                String::new()
            } else {
                format!("-m statistic --mode random --probability {:.10}", 1.0 / left as f64)
            };
            writeln!(rules, "-A KUBE-SVC-{i} {about} {chance} -j KUBE-SEP-{i}-{e}")?;
            writeln!(rules, "-A KUBE-SEP-{i}-{e} -s {to}/32 {about} -j KUBE-MARK-MASQ")?;
            writeln!(
                rules,
                "-A KUBE-SEP-{i}-{e} -p {protocol} {about} -m {protocol} -j DNAT --to-destination {to}:{to_port}"
            )?;
        }
    }
    feed(namespace, &["iptables-legacy-restore", "--noflush"], &format!("{chains}{rules}COMMIT\n"))
}

/// Runs a program inside a namespace, with `text` as its standard input.
fn feed(namespace: &Namespace, program: &[&str], text: &str) -> Result<()> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("ip");
    command.env("PATH", path).args(["netns", "exec", namespace.name()]).args(program);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("the program has no stdin pipe")?;
    let written = stdin.write_all(text.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{} failed: {}",
        program[0],
        stderr.lines().take(3).collect::<Vec<_>>().join("; ")
    );
    Ok(written?)
}

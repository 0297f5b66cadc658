//! The Bookinfo services of the demo: productpage calls details and reviews, reviews calls ratings.
//!
//! Each pod is a process that listens on the pod's address and dials only Service addresses.
//! Each call is a single attempt over a new connection.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, ensure};
use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{Html, IntoResponse, Response},
    routing::get,
};
use clap::{Parser, ValueEnum};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
};

/// Time limit of a call, including the whole response.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    Productpage,
    Details,
    Reviews,
    Ratings,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sickness {
    /// Every response has status 500
    Errors,
    /// Every connection is reset when a request arrives
    Resets,
    /// No request is ever answered
    Hangs,
}

#[derive(Debug, Parser)]
struct Arguments {
    /// Service that this pod runs
    role: Role,
    /// Address and port of the pod to listen on
    #[arg(long)]
    listen: SocketAddr,
    /// Name of the pod, which pages show
    #[arg(long)]
    pod: String,
    /// Version of reviews: v1 shows no stars, v2 black stars, v3 red stars
    #[arg(long, default_value = "v1")]
    version: String,
    /// Fault to simulate: the pod listens, but does not serve
    #[arg(long)]
    sick: Option<Sickness>,
    /// Service address of details
    #[arg(long)]
    details: Option<SocketAddr>,
    /// Service address of reviews
    #[arg(long)]
    reviews: Option<SocketAddr>,
    /// Service address of ratings
    #[arg(long)]
    ratings: Option<SocketAddr>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arc::new(Arguments::parse());
    let listener =
        TcpListener::bind(arguments.listen).await.with_context(|| format!("cannot listen on {}", arguments.listen))?;
    match arguments.sick {
        Some(Sickness::Errors) => {
            let errors = Router::new().fallback(async || StatusCode::INTERNAL_SERVER_ERROR);
            return Ok(axum::serve(listener, errors).await?);
        }
        Some(sickness) => return be_sick(listener, sickness).await,
        None => {}
    }
    let router = match arguments.role {
        Role::Productpage => Router::new().route("/productpage", get(productpage)),
        Role::Details => Router::new().route("/details", get(details)),
        Role::Reviews => Router::new().route("/reviews", get(reviews)),
        Role::Ratings => Router::new().route("/ratings", get(ratings)),
    };
    Ok(axum::serve(listener, router.with_state(arguments)).await?)
}

/// Accepts connections without answering: resets each when a request arrives, or keeps it open.
async fn be_sick(listener: TcpListener, sickness: Sickness) -> Result<()> {
    let mut open = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().await?;
        if let Sickness::Resets = sickness {
            // A client that is already gone needs no reset.
            let _ = stream.read(&mut [0; 1]).await;
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        } else {
            open.push(stream);
        }
    }
}

async fn productpage(State(own): State<Arc<Arguments>>) -> Html<String> {
    let details = match call(own.details, "/details").await {
        Ok(details) => format!("<dt>Pages</dt><dd>{}</dd>", details["pages"]),
        Err(error) => {
            format!("<p>Sorry, product details are currently unavailable for this book.</p><!-- {error:#} -->")
        }
    };
    let reviews = match call(own.reviews, "/reviews").await {
        Ok(reviews) => show_reviews(&reviews),
        Err(error) => {
            format!("<p>Sorry, product reviews are currently unavailable for this book.</p>\n<!-- {error:#} -->")
        }
    };
    Html(format!(
        "<!DOCTYPE html>\n<title>Simple Bookstore App</title>\n<!-- productpage: {} -->\n<h3>The Comedy of Errors</h3>\n\
         <h4>Book Details</h4>\n{details}\n<h4>Book Reviews</h4>\n{reviews}\n",
        own.pod
    ))
}

fn show_reviews(reviews: &Value) -> String {
    let mut page = format!("<!-- reviews: {} -->\n", reviews["podname"].as_str().unwrap_or_default());
    for review in reviews["reviews"].as_array().into_iter().flatten() {
        page += &format!("<blockquote>{}</blockquote>\n", review["text"].as_str().unwrap_or_default());
        if let Some(stars) = review["rating"]["stars"].as_u64() {
            let color = review["rating"]["color"].as_str().unwrap_or_default();
            page += &format!(
                "<font color=\"{color}\">\n<!-- full stars: -->\n{}</font>\n",
                "&#9733;".repeat(stars as usize)
            );
        } else if let Some(error) = review["rating"]["error"].as_str() {
            page += &format!("<i>{error}</i>\n");
        }
    }
    page
}

async fn details() -> Json<Value> {
    Json(json!({"id": 0, "pages": 200, "publisher": "PublisherA"}))
}

async fn reviews(State(own): State<Arc<Arguments>>) -> Json<Value> {
    let color = match own.version.as_str() {
        "v2" => Some("black"),
        "v3" => Some("red"),
        _ => None,
    };
    let ratings = match color {
        None => None,
        Some(_) => Some(call(own.ratings, "/ratings").await),
    };
    let list: Vec<Value> = ["Reviewer1", "Reviewer2"]
        .iter()
        .map(|reviewer| {
            let text = format!("{reviewer}: an extremely entertaining play");
            match &ratings {
                None => json!({"reviewer": reviewer, "text": text}),
                Some(Ok(ratings)) => json!({
                    "reviewer": reviewer, "text": text,
                    "rating": {"stars": ratings["ratings"][reviewer], "color": color},
                }),
                Some(Err(_)) => json!({
                    "reviewer": reviewer, "text": text,
                    "rating": {"error": "Ratings service is currently unavailable"},
                }),
            }
        })
        .collect();
    Json(json!({"id": 0, "podname": own.pod, "reviews": list}))
}

async fn ratings() -> Response {
    (StatusCode::OK, Json(json!({"id": 0, "ratings": {"Reviewer1": 5, "Reviewer2": 4}}))).into_response()
}

/// Calls a service in a single attempt over a new connection.
async fn call(service: Option<SocketAddr>, path: &str) -> Result<Value> {
    let service = service.context("the Service address to call is not configured")?;
    tokio::time::timeout(LIMIT, async {
        let stream = TcpStream::connect(service).await.with_context(|| format!("cannot connect to {service}"))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::get(path)
            .header(header::HOST, service.to_string())
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())?;
        let response = sender.send_request(request).await?;
        ensure!(response.status().is_success(), "{service}{path}: {}", response.status());
        Ok(serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?)
    })
    .await
    .with_context(|| format!("no response from {service} in time"))?
}

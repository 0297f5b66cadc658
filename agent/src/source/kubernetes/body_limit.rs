//! Limits the size of response bodies.
//!
//! The client buffers a response in memory as a whole, and the sender may be a remote cluster's API server.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame};
use tower::{BoxError, Layer, Service};

/// Maximum size in bytes of a response body, or of one line of a watch: about twenty times the largest object that
/// Kubernetes accepts.
pub(super) const MOST: usize = 32 << 20;

/// The error for a body or watch line of more than [`MOST`] bytes.
#[derive(Debug, thiserror::Error)]
#[error("response exceeds {MOST} bytes")]
pub(super) struct TooLong;

impl TooLong {
    /// Returns whether this error is in the source chain of `error`.
    pub(super) fn is_behind(error: &(dyn std::error::Error + 'static)) -> bool {
        std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<Self>())
    }
}

/// A response body with the limit applied.
type LimitedBody = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;

/// The `tower` layer that limits all responses of a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyLimit;

impl<S> Layer<S> for BodyLimit {
    type Service = Bounding<S>;

    fn layer(&self, inner: S) -> Bounding<S> {
        Bounding { inner }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Bounding<S> {
    inner: S,
}

impl<S, R, B> Service<Request<R>> for Bounding<S>
where
    S: Service<Request<R>, Response = Response<B>, Error = BoxError, Future: Send + 'static>,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<LimitedBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let per_line =
            request.uri().query().is_some_and(|query| query.split('&').any(|part| part.starts_with("watch=")));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // The client buffers an error response as a whole.
            let per_line = per_line && answer.status().is_success();
            Ok(answer.map(|body| -> LimitedBody {
                Box::pin(Bounded { body: Box::pin(body.map_err(Into::into)), taken: 0, per_line })
            }))
        })
    }
}

struct Bounded<B> {
    body: Pin<Box<B>>,
    /// Bytes received of the body, or of the current line.
    taken: usize,
    /// Whether the limit applies to each line, as in a watch.
    per_line: bool,
}

impl<B: Body<Data = Bytes, Error = BoxError>> Body for Bounded<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = ready!(self.body.as_mut().poll_frame(context)?) else { return Poll::Ready(None) };
        if let Some(data) = frame.data_ref() {
            let line = if self.per_line { data.iter().rposition(|byte| *byte == b'\n') } else { None };
            self.taken = line.map_or(self.taken + data.len(), |end| data.len() - end - 1);
            if self.taken > MOST {
                return Poll::Ready(Some(Err(TooLong.into())));
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::StreamBody;

    use super::*;

    async fn taken(parts: &[&'static str], times: usize, per_line: bool) -> Result<usize, BoxError> {
        let parts: Vec<&'static str> = std::iter::repeat_n(parts, times).flatten().copied().collect();
        let frames = parts.into_iter().map(|part| Ok::<_, BoxError>(Frame::data(Bytes::from_static(part.as_bytes()))));
        let body = Box::pin(StreamBody::new(stream::iter(frames)));
        let mut bounded = Box::pin(Bounded { body, taken: 0, per_line });
        let mut all = 0;
        while let Some(frame) = bounded.frame().await {
            all += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn body_is_limited_as_a_whole_and_watch_line_by_line() {
        const KIB: &str = match str::from_utf8(&[b'x'; 1024]) {
            Ok(text) => text,
            Err(_) => panic!(),
        };
        let fitting = MOST / KIB.len();
        assert_eq!(taken(&[KIB], fitting, false).await.unwrap(), MOST);
        let error = taken(&[KIB, "\n"], fitting, false).await.unwrap_err();
        assert!(TooLong::is_behind(&*error), "{error}");
        assert_eq!(taken(&[KIB, "x\nx"], 2 * fitting, true).await.unwrap(), 2 * (MOST + 3 * fitting));
        assert!(taken(&[KIB], fitting + 1, true).await.is_err());
    }
}

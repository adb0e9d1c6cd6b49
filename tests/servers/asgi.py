"""The same app for servers that speak ASGI."""

from a2wsgi import WSGIMiddleware

from .app import application as wsgi_application

application = WSGIMiddleware(wsgi_application)
